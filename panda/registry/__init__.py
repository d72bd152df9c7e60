"""Names, options, plugins: finds and describes components. Imports nothing else of panda, and no torch."""

from panda.registry.catalog import Catalog as Catalog
from panda.registry.components import Component as Component
from panda.registry.components import NoOptions as NoOptions
from panda.registry.components import decorator_for as decorator_for
from panda.registry.components import register_arch as register_arch
from panda.registry.components import register_kind as register_kind
from panda.registry.components import register_lr_scheduler as register_lr_scheduler
from panda.registry.components import register_model as register_model
from panda.registry.components import register_optimizer as register_optimizer
from panda.registry.components import register_plugin as register_plugin
from panda.registry.components import register_reader as register_reader
from panda.registry.components import register_task as register_task
from panda.registry.errors import UserError as UserError
from panda.registry.hookspecs import hookimpl as hookimpl
from panda.registry.location import Location as Location
from panda.registry.offers import Offer as Offer
from panda.registry.options import Meta as Meta
from panda.registry.options import Names as Names
from panda.registry.options import OfEvaluations as OfEvaluations
