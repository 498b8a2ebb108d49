"""Run by the interpreter that has vLLM: a command line as a JSON list on each line of standard input, what is wrong on standard output."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # whatever vLLM prints goes elsewhere

from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args  # noqa: E402
from vllm.utils.argparse_utils import FlexibleArgumentParser  # noqa: E402

import kaito_runtime_vllm.engine  # noqa: E402, F401

parser = make_arg_parser(FlexibleArgumentParser())
for line in sys.stdin:
    words, wrong = json.loads(line), ""
    said = io.StringIO()
    try:
        assert words[0] == "serve", words
        with contextlib.redirect_stderr(said):
            args = parser.parse_args(words[1:])
            validate_parsed_serve_args(args)
        if args.model_tag != words[1]:
            wrong = f"the model became {args.model_tag!r}"
    except SystemExit:
        wrong = said.getvalue()[-500:] or "ended"
    except Exception as e:
        wrong = f"{type(e).__name__}: {e}"
    answers.write(json.dumps(wrong) + "\n")
    answers.flush()
