"""`python -m provq`, which is also what `torchrun -m provq` starts."""

from provq.cli import main

main()
