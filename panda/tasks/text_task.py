"""Next-token prediction over rows of files."""

from __future__ import annotations

from panda.data.conversations import UnusableRowError as UnusableRowError
from panda.tasks.language_modelling import LanguageModelling
from panda.tasks.row_task import RowTask


class TextTask(RowTask, LanguageModelling):
    """Rows to texts: a subclass says what a row means, and how that becomes tokens, which are then predicted."""
