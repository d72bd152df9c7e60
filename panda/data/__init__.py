"""Where text comes from and how it reaches the device: readers, token data sets, order, batches."""

from panda.data.reading import BadRow as BadRow
from panda.data.reading import Reader as Reader
from panda.data.reading import Row as Row
