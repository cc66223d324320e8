"""``python -m pgrpo``, and so ``torchrun -m pgrpo``."""

from pgrpo.cli import main

if __name__ == "__main__":
    main()
