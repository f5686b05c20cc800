"""The command `minilm`. Its commands are thin: they read arguments, call one function and print what it returns."""

import os
import sys
import warnings

import click

from data_prep.errors import UserError, words_of
from launch.commands import corpora, models, runs

EXIT_USER_ERROR = 2


def main() -> None:
    """Entry point: a user's mistake is one message and exit code 2, never a traceback."""
    quiet_libraries()
    try:
        minilm.main(prog_name="minilm", standalone_mode=False)
    except (UserError, OSError) as error:
        click.echo(f"minilm: error: {words_of(error)}", err=True)
        sys.exit(EXIT_USER_ERROR)
    except click.ClickException as error:
        error.show()
        sys.exit(EXIT_USER_ERROR)
    except (click.Abort, KeyboardInterrupt):
        click.echo("minilm: interrupted", err=True)
        sys.exit(130)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="minilmv2-deepspeed")
def minilm() -> None:
    """Distill small encoders from large ones (MiniLMv2) with DeepSpeed.

    \b
    minilm samples                                     real text and a real teacher to try it on
    minilm prepare --tokenizer T --source ... --out C  text -> token shards
    minilm plan --recipe R --gpu G                     what that will take: memory, time, cost
    minilm distill --recipe R                          shards + teacher -> checkpoints
    minilm export RUN                                  checkpoint -> Hugging Face model
    minilm evaluate RUN_OR_MODEL                       exported model -> scores, on tasks if asked
    minilm compare RUN...                              runs side by side: what differs, what came of it
    minilm inspect PATH                                what is in a corpus or a run
    """


for command in (
    *(corpora.samples, corpora.prepare, runs.plan, runs.distill),
    *(models.export, models.evaluate, runs.compare, corpora.inspect),
):
    minilm.add_command(command)


def quiet_libraries() -> None:
    """Keep the libraries' own bars and start-up notes off the terminal; their warnings and errors stay."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
