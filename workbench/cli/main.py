"""The `workbench` command.

Exit codes: 0 done; 1 the data are damaged or the work failed; 2 the request was wrong; 130 interrupted. Errors are one
line on stderr; `--debug` shows the traceback. Nothing is imported before an interrupt is handled.
"""

TYPE_CHECKING = False

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from workbench.cli.arguments import Command


def main(arguments: "Sequence[str] | None" = None) -> None:
    """Runs the `workbench` command and exits the process."""

    def command(words: "list[str]") -> "Command":
        from workbench.cli.verbs import find_command

        return find_command(words)

    _exit(command, arguments)


def run_experiment(name: str, arguments: "Sequence[str] | None" = None) -> None:
    """Runs one experiment with the settings of its own command line, in a run folder, and exits the process."""

    def command(words: "list[str]") -> "Command":
        from workbench.cli.experiment_verbs import experiment_command

        return experiment_command(name, words)

    _exit(command, arguments)


def _exit(command: "Callable[[list[str]], Command]", arguments: "Sequence[str] | None") -> None:
    try:
        from workbench.cli.process import run_command

        run_command(command, arguments)
    except KeyboardInterrupt:
        import sys

        sys.stderr.write("workbench: interrupted\n")
        sys.exit(130)
