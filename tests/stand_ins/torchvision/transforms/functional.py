from torchvision.missing import missing as __getattr__  # noqa: F401
from torchvision.transforms.v2.functional import InterpolationMode, pil_to_tensor, resize  # noqa: F401
