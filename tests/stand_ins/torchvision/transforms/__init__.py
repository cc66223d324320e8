from torchvision.missing import missing as __getattr__  # noqa: F401
from torchvision.transforms.v2.functional import InterpolationMode  # noqa: F401
