"""The YAML's `wandb` and `tensorboard`, without importing Lightning."""

from dataclasses import dataclass

from solo_ext.errors import ConfigError
from solo_ext.schema import Config


@dataclass
class WandbConfig(Config, section="wandb"):
    """The YAML's `wandb`. The API key is wandb's own business (`wandb login`, WANDB_API_KEY) and has no key here.

    offline: log to the run folder; `wandb sync` uploads it later.
    """

    enabled: bool = False
    entity: str | None = None
    project: str = "solo-ext"
    offline: bool = False


@dataclass
class TensorboardConfig(Config, section="tensorboard"):
    """The YAML's `tensorboard`: event files in `<run folder>/tensorboard`."""

    enabled: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.enabled:
            try:
                import torch.utils.tensorboard  # noqa: F401
            except ImportError:
                raise ConfigError(
                    "tensorboard.enabled is true but TensorBoard is not installed: pip install 'solo-ext[viz]'"
                ) from None
