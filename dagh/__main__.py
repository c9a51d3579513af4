"""``python -m dagh``."""

from dagh._cli import main

if __name__ == "__main__":
    main()
