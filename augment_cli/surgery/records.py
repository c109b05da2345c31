"""Records of a conversion, for the converted model's metadata."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from augment_cli.bounds import CountOfChannels, Name, Total


class Inheritance(BaseModel):
    """The part of its source that one site kept.

    exact: the source's function; carried: some filters bit for bit, with `share` of the importance of all; fitted: as
    carried, and attention computes what the other filters did, with a normalised mean squared error of `error` on
    images that were held out of the fit; new: nothing.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: Name
    kind: Literal["exact", "carried", "fitted", "new"]
    kept: CountOfChannels
    given_up: CountOfChannels
    share: Annotated[float, Field(ge=0, le=1)]
    error: Annotated[float, Field(ge=0)] | None = None


class Fidelity(BaseModel):
    """A converted model beside its source on `images` calibration images, held out of a fit on `fitted_on` others.

    agreement: on how many both have the same first class, as a share; divergence: KL of the source's probabilities from
    the converted model's, in nats, on average.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    images: Total
    fitted_on: Total
    agreement: Annotated[float, Field(ge=0, le=1)]
    divergence: Annotated[float, Field(ge=0)]
