"""`python -m provq`, which is also what `torchrun -m provq` starts."""

from provq.cli import main

if __name__ == "__main__":  # processes of a comparison import this file too
    main()
