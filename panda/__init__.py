"""panda trains large language models: names become training runs.

These are the names that a package with components imports. Importing them is fast.
"""

from panda.registry import Location as Location
from panda.registry import Meta as Meta
from panda.registry import Names as Names
from panda.registry import NoOptions as NoOptions
from panda.registry import OfEvaluations as OfEvaluations
from panda.registry import UserError as UserError
from panda.registry import decorator_for as decorator_for
from panda.registry import hookimpl as hookimpl
from panda.registry import register_arch as register_arch
from panda.registry import register_kind as register_kind
from panda.registry import register_lr_scheduler as register_lr_scheduler
from panda.registry import register_model as register_model
from panda.registry import register_optimizer as register_optimizer
from panda.registry import register_plugin as register_plugin
from panda.registry import register_reader as register_reader
from panda.registry import register_task as register_task
from panda.registry.api import API_VERSION as API_VERSION
from panda.training import Trained as Trained
from panda.training import train as train

__version__ = "0.1.0"
