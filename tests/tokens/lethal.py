"""Items at which processes die, or the work ends; a module of its own, for actors import it."""

import os
import signal

from stores import Pixels

from provq.errors import UserError


class Lethal(Pixels):
    """Whoever first reads one item is killed (SIGKILL): the process, or the machine that it is on.

    The process above an actor is its machine, as far as Ray knows. A file is there once it is dead.
    """

    def __init__(self, count, unreadable, *, item, kills, mark):
        super().__init__(count, unreadable)
        self.fatal = item
        self.kills = kills
        self.mark = mark

    def item(self, index, epoch):
        if index == self.fatal and not self.mark.exists():
            self.mark.touch()
            if self.kills == "machine":
                os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().item(index, epoch)


class Refusing(Pixels):
    """One item ends the work."""

    def __init__(self, count, refused):
        super().__init__(count)
        self.refused = refused

    def item(self, index, epoch):
        if index == self.refused:
            raise UserError(f"data: item-{index} is too small")
        return super().item(index, epoch)
