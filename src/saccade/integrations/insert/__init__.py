"""A feature-map gate into an existing network: `saccade.insert(model, "cbam", after="encoder.stages.*")`.

A gate becomes a child of the module whose output it gates, under the name `saccade_gate`, and a forward hook applies
it. So every parameter of the network keeps its name (its old checkpoints load, `strict=False` for the gates that they
lack), the code around the place still finds the module that it expects, and the whole, gates included, is in
`state_dict()`: to load such a state, insert the same gates into a fresh network first.

A plain `nn.Sequential` runs all its children, so a gate after one goes into its last module, whose output is the
sequence's.
"""

from saccade.integrations.insert.files import load, pretrained, save
from saccade.integrations.insert.insertion import Gentle, insert
from saccade.integrations.insert.report import Inserted, Place

__all__ = ["Gentle", "Inserted", "Place", "insert", "load", "pretrained", "save"]
