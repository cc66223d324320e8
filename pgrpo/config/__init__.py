"""The config: ``schema.py`` has every key (begin there), ``load_config`` is the only way to make a config from a YAML.
Imports neither torch nor transformers, so that wrong input is refused at once.
"""

from pgrpo.config.load import check_world_size, find_file, fit_world_size, load_config, packaged, to_yaml
from pgrpo.config.schema import (
    CheckpointConfig,
    Config,
    ConfigError,
    DataConfig,
    EvalConfig,
    LossConfig,
    MessageConfig,
    ModelConfig,
    OptimConfig,
    PromptConfig,
    RewardConfig,
    RewardsConfig,
    RolloutConfig,
    TrackConfig,
    TrainConfig,
)
from pgrpo.config.secrets import REDACTED, redact, remember, to_json

__all__ = [
    "REDACTED",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvalConfig",
    "LossConfig",
    "MessageConfig",
    "ModelConfig",
    "OptimConfig",
    "PromptConfig",
    "RewardConfig",
    "RewardsConfig",
    "RolloutConfig",
    "TrackConfig",
    "TrainConfig",
    "check_world_size",
    "find_file",
    "fit_world_size",
    "load_config",
    "packaged",
    "redact",
    "remember",
    "to_json",
    "to_yaml",
]
