"""The schema, and the only way into it: ``load_config``. Imports neither torch nor transformers."""

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
from pgrpo.config.secrets import redact

__all__ = [
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
    "to_yaml",
]
