from torchvision.missing import missing as __getattr__  # noqa: F401
