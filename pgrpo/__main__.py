"""``python -m pgrpo``, and so ``torchrun -m pgrpo``; the command ``pgrpo`` is the same."""

from pgrpo.cli import main
from pgrpo.process.exit import run_and_leave


def run() -> None:
    run_and_leave(main)


if __name__ == "__main__":
    run()
