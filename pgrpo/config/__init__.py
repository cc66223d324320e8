"""The config. ``schema.py`` and ``task.py`` define every key (begin there); ``load_config`` reads a YAML into a checked ``Config``.
The package imports neither torch nor transformers, so wrong input is rejected within a second.
"""

from pgrpo.config.fields import PYTHON, ConfigError
from pgrpo.config.load import find_file, load_config, packaged, to_yaml, with_rewards
from pgrpo.config.rules import check_world_size, fit_world_size
from pgrpo.config.schema import Config, LossConfig, ModelConfig, OptimConfig, RolloutConfig
from pgrpo.config.secrets import REDACTED, redact, redact_error, remember, to_json
from pgrpo.config.task import DataConfig, MessageConfig, PromptConfig, RewardConfig

__all__ = [
    "PYTHON",
    "REDACTED",
    "Config",
    "ConfigError",
    "DataConfig",
    "LossConfig",
    "MessageConfig",
    "ModelConfig",
    "OptimConfig",
    "PromptConfig",
    "RewardConfig",
    "RolloutConfig",
    "check_world_size",
    "find_file",
    "fit_world_size",
    "load_config",
    "packaged",
    "redact",
    "redact_error",
    "remember",
    "to_json",
    "to_yaml",
    "with_rewards",
]
