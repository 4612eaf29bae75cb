"""`kvprofile policies`: the policies by name."""

import click


@click.command(short_help="List the policies by name.")
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON on stdout.")
def policies(as_json: bool) -> None:
    """List the policies by name: which tokens lose their slots first, and what becomes of them (docs/policies.md)."""
    from kvprofile.merging.policies import POLICIES
    from kvprofile.report import terminal

    rows = [
        {
            "policy": name,
            "ranks by": policy.affinity,
            "what loses its slot": policy.rule + (", values mended" if policy.mends else ""),
        }
        for name, policy in POLICIES.items()
    ]
    terminal.named(rows, as_json)
