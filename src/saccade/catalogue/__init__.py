"""What there is: 119 papers, the parts built from them, and each part's evidence.

This package knows names and paths; it imports a part only when it is asked for one. `papers()` lists the papers,
`parts()` those that have a room, `part(slug)` is the full registration, `create(slug, **arguments)` builds and
`options(slug)` says what it takes.
"""

from saccade.catalogue.authors import load_authors as load_authors
from saccade.catalogue.authors import load_state as load_state
from saccade.catalogue.cards import (
    AXES as AXES,
)
from saccade.catalogue.cards import (
    AuthorsPort as AuthorsPort,
)
from saccade.catalogue.cards import (
    Claim as Claim,
)
from saccade.catalogue.cards import (
    ClaimResult as ClaimResult,
)
from saccade.catalogue.cards import (
    Paper as Paper,
)
from saccade.catalogue.cards import (
    Part as Part,
)
from saccade.catalogue.cards import (
    Published as Published,
)
from saccade.catalogue.cards import (
    Replacement as Replacement,
)
from saccade.catalogue.cards import (
    Summary as Summary,
)
from saccade.catalogue.kinds import KINDS as KINDS
from saccade.catalogue.kinds import Kind as Kind
from saccade.catalogue.names import (
    Names as Names,
)
from saccade.catalogue.names import (
    joined as joined,
)
from saccade.catalogue.names import (
    laid as laid,
)
from saccade.catalogue.names import (
    split as split,
)
from saccade.catalogue.options import REQUIRED as REQUIRED
from saccade.catalogue.options import Option as Option
from saccade.catalogue.options import nearest as nearest
from saccade.catalogue.registry import (
    check_options as check_options,
)
from saccade.catalogue.registry import (
    create as create,
)
from saccade.catalogue.registry import (
    options as options,
)
from saccade.catalogue.registry import (
    paper as paper,
)
from saccade.catalogue.registry import (
    papers as papers,
)
from saccade.catalogue.registry import (
    part as part,
)
from saccade.catalogue.registry import (
    parts as parts,
)
from saccade.catalogue.registry import (
    port as port,
)
from saccade.catalogue.registry import (
    register as register,
)
from saccade.catalogue.registry import (
    select as select,
)
