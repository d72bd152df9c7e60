"""From files to batches: readers, tokenised data sets, the order of samples, rows."""

from panda.data.reading import BadRow as BadRow
from panda.data.reading import Reader as Reader
from panda.data.reading import Row as Row
