"""The checker of annotations that tests run with: beartype, for which a whole number is a float too, as for mypy."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
