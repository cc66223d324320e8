"""As vLLM's decorator of a model's class: it has another base, is made beside a config, and is called by what that leaves in it."""

config = None
"""Set while a model is made."""


class Compiled:
    """A base that vLLM's models have."""


def _support_torch_compile(cls, dynamic_arg_dims=None, enable_if=None):
    if Compiled in cls.__bases__:
        return cls
    cls.__bases__ += (Compiled,)
    made = cls.__init__

    def __init__(self, *args, **kwargs):
        assert config is not None, "Current vLLM config is not set."
        made(self, *args, **kwargs)
        self.do_not_compile = enable_if is not None and not enable_if(config)

    def __call__(self, *args, **kwargs):
        assert self.do_not_compile
        return self.forward(*args, **kwargs)

    cls.__init__, cls.__call__ = __init__, __call__
    return cls
