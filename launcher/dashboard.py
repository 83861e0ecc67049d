"""Create the W&B workspace that the repository describes; without a server, check it and print it.

python launcher/dashboard.py                                checks dashboards/training.yaml and prints its panels
python launcher/dashboard.py entity=TEAM project=PROJECT    creates the workspace there and prints its address
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dsv3_megatron.metrics.names import FAMILIES, NAMES
from dsv3_megatron.run.reasons import first_line
from dsv3_megatron.run.recipe_text.yaml_text import read_yaml
from launcher.command_line.arguments import Arguments, takes
from launcher.command_line.console import guarded
from launcher.command_line.recipe_files import DATA
from parallel.errors import PackageError, RecipeError

SHIPPED = DATA / "dashboards" / "training.yaml"


class DashboardArguments(Arguments):
    """Keys of the command."""

    file: Path = Field(SHIPPED, description="the dashboard")
    entity: str | None = Field(None, description="W&B team or user; null = only check and print")
    project: str = Field("dsv3-megatron", description="W&B project, logging.wandb_project of the recipes")


class Panel(BaseModel):
    """One line plot over tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    y: tuple[str, ...] = Field(min_length=1)
    log_y: bool = False


class Section(BaseModel):
    """Panels under a heading."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    panels: tuple[Panel, ...] = Field(min_length=1)


class Dashboard(BaseModel):
    """A workspace."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    sections: tuple[Section, ...] = Field(min_length=1)


@takes(DashboardArguments, __doc__)
def main(asked: DashboardArguments) -> int:
    """Check, print, and where an entity is named create; return the exit code."""
    dashboard = load(asked.file)
    if asked.entity is None:
        print(describe(dashboard))
        return 0
    print(create(dashboard, asked.entity, asked.project))
    return 0


def load(path: Path) -> Dashboard:
    """Return the dashboard of a file. Raises RecipeError: unreadable, or a metric that no run logs."""
    try:
        dashboard = Dashboard.model_validate(read_yaml(path))
    except OSError as error:
        raise RecipeError(f"file = {path} cannot be read ({error.strerror}); name a file of dashboards/") from None
    except ValidationError as error:  # a ValueError too
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])[:200]
        raise RecipeError(f"{path.name}: {where}: {first['msg'][:1].lower()}{first['msg'][1:]}") from None
    except ValueError as error:
        raise RecipeError(f"file = {error}") from None
    known = {*NAMES.values(), *(f"{family}/*" for family in FAMILIES)}
    for section in dashboard.sections:
        for panel in section.panels:
            for name in panel.y:
                if not {name, name.removesuffix("/*")} & known:
                    raise RecipeError(
                        f"{path.name}: panel {panel.title[:80]!r} shows {name[:80]}, which no run logs; there are: "
                        f"{', '.join(sorted(known))}"
                    )
    return dashboard


def describe(dashboard: Dashboard) -> str:
    """Return the workspace as text."""
    lines = [dashboard.name]
    for section in dashboard.sections:
        lines.append(f"\n{section.name}")
        for panel in section.panels:
            lines.append(f"  {panel.title:<34} {', '.join(panel.y)}{'  (log)' if panel.log_y else ''}")
    return "\n".join(lines)


def workspace(dashboard: Dashboard, entity: str, project: str) -> Any:
    """Return the dashboard as wandb-workspaces' object. Raises PackageError where the package is missing."""
    try:
        import wandb_workspaces.reports.v2 as panels  # an optional package
        import wandb_workspaces.workspaces as workspaces
    except ImportError:
        raise PackageError(
            "entity needs the wandb-workspaces package; pip install -e '.[dashboard]', or leave entity out to print"
        ) from None
    sections = []
    for section in dashboard.sections:
        plots: list[Any] = []  # its own type is a union of every kind of panel
        for panel in section.panels:
            every = [name for name in panel.y if name.endswith("/*")]
            plots.append(
                panels.LinePlot(
                    title=panel.title,
                    x=NAMES["tokens"],
                    y=[name for name in panel.y if not name.endswith("/*")],
                    metric_regex=f"^{every[0].removesuffix('/*')}/" if every else None,
                    log_y=panel.log_y,
                )
            )
        sections.append(workspaces.Section(name=section.name, panels=plots, is_open=True))
    settings = workspaces.WorkspaceSettings(x_axis=NAMES["tokens"])
    return workspaces.Workspace(
        entity=entity, project=project, name=dashboard.name, sections=sections, settings=settings
    )


def create(dashboard: Dashboard, entity: str, project: str) -> str:
    """Save the workspace on the server; return its address. Raises PackageError with the server's first line."""
    made = workspace(dashboard, entity, project)
    try:
        made.save()
    except Exception as error:  # the client has many kinds for: not logged in, no such team, no network
        raise PackageError(
            f"entity = {entity}: W&B did not take the workspace ({first_line(error)}); `wandb login` first, or leave "
            "entity out"
        ) from None
    return made.url


if __name__ == "__main__":
    sys.exit(guarded(main))
