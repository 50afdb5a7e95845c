"""The commands. Heavy imports stand inside them, so that `saccade --help` answers at once."""

from saccade.cli.commands import conversion, costs, experiments, models, parts
from saccade.cli.commands.app import app

__all__ = ["app"]

# in the order of `saccade --help`
app.command("list")(parts.list_parts)
app.command()(parts.show)
app.command()(costs.plan)
app.command()(costs.bench)
app.command()(experiments.claim)
app.command()(experiments.compare)
app.command()(models.advise)
app.command()(conversion.convert)
app.command()(experiments.gallery)
app.command()(models.insert)
app.command()(models.run)
app.command()(models.explain)
app.command("fuse-metrics")(models.fuse_metrics)
app.command()(parts.new)
