"""The largest numbers, texts and lists that a plan, a recipe or a file's metadata may hold.

Each is far above what any model of timm needs, and far below what would take long or much memory.
"""

from typing import Annotated

from pydantic import Field

MOST_CHANNELS = 2**16
MOST_SIDE = 2**13  # of an image or a feature map
MOST_KERNEL = 255
MOST_HEADS = 1024
MOST_KEYS = 64  # least key channels per head that a recipe can ask for
MOST_LISTED = 1000
MOST_CONVOLUTIONS = 100_000

Channels = Annotated[int, Field(ge=1, le=MOST_CHANNELS)]
CountOfChannels = Annotated[int, Field(ge=0, le=MOST_CHANNELS)]
Side = Annotated[int, Field(ge=1, le=MOST_SIDE)]
KernelSide = Annotated[int, Field(ge=1, le=MOST_KERNEL)]
Total = Annotated[int, Field(ge=0, le=2**60)]

Name = Annotated[str, Field(max_length=500)]
Text = Annotated[str, Field(max_length=5000)]
Sha256 = Annotated[str, Field(pattern="^([0-9a-f]{64})?$")]
