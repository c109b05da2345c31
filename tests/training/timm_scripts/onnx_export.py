"""Exports as timm's onnx_export.py does, by timm's own function, with its comparison."""

from neighbour import parser
from timm.models import create_model
from timm.utils.model import reparameterize_model
from timm.utils.onnx import onnx_export

options = parser(("--model", "mobilenetv3_large_100"), ("--checkpoint", ""), flags=("--dynamo", "--reparam"))
options.add_argument("output")
args = options.parse_args()
model = create_model(
    args.model,
    num_classes=args.num_classes,
    in_chans=3,
    pretrained=not args.checkpoint,
    checkpoint_path=args.checkpoint,
    exportable=True,
)
if args.reparam:
    model = reparameterize_model(model)
onnx_export(
    model,
    args.output,
    check_forward=True,
    use_dynamo=args.dynamo,
    input_size=(3, args.img_size, args.img_size),
    batch_size=1,
)
