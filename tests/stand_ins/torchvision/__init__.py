"""As much of torchvision as transformers' image processors need, for machines where torchvision does not load beside PyTorch.

vLLM's Qwen-VL files import transformers' processors, and these torchvision. What an image passes through
(``transforms/v2/functional``) is computed here as torchvision does it, by PyTorch's ``interpolate`` with antialiasing; the rest is
names, which raise when they are called. Put this folder's parent on PYTHONPATH: vLLM looks at a model in a process of its own too.
"""

from torchvision.missing import missing as __getattr__  # noqa: F401

__version__ = "0.28.0"
