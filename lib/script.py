"""How a script starts and ends, its arguments, its notes and progress, and text for its messages."""
import argparse
import contextlib
import errno
import importlib.util
import os
import signal
import sys
import threading

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # otherwise ONNX Runtime >= 1.29 reports each model to its makers
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")   # numpy's threads are not needed. If none can be started, its import
                                                     # would end the process

MAX_LISTED = 1000    # an error lists at most this many items
READER_ENDED = 141   # exit status if the program that reads the output has ended, as head does: 128 + SIGPIPE, as in a shell
THREAD_LIMIT = "the limit of processes, threads or memory is reached (ulimit -u and -v, a container's pids limit)"
seen_notes = set()   # the notes that have been printed


# --- start and end ----------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def importing(ends=True):
    """Wraps the import of a large library. In the block, Ctrl-C ends the process at once.

    Otherwise the library could turn the KeyboardInterrupt into another error, such as an ImportError. If ends is set, a
    missing library ends the process with a one-line message, because command() may not be running yet.
    """
    main = threading.current_thread() is threading.main_thread()  # only the main thread may set a handler
    before = signal.signal(signal.SIGINT, signal.SIG_DFL) if main else None
    try:
        yield
    except ImportError as error:
        if not ends:
            raise
        sys.exit(missing(error))
    finally:
        if main:
            signal.signal(signal.SIGINT, before)


def has_module(name):
    """Returns whether this Python has a module."""
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:  # a plain module has the package's name
        return False


def script_name():
    """Returns the name of the script that runs, for its messages."""
    return os.path.basename(os.path.realpath(sys.argv[0]))


def missing(error):
    """Returns the message for an ImportError."""
    return "%s: error: %s; install the packages in requirements.txt" % (script_name(), error)


def command(main):
    """Runs a script's main(). Turns an error into one line, 'SCRIPT: error: ...', and exit status 1."""
    script = script_name()
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the caller closed it
            setattr(sys, name, open(os.devnull, "w"))
        getattr(sys, name).reconfigure(errors="backslashreplace")  # the terminal may not be able to show every name
    status = None
    try:
        main()
    except SystemExit as stop:  # argparse raises it
        status = stop.code
    except BrokenPipeError:
        status = READER_ENDED
    except ImportError as error:
        status = missing(error)
    except (OSError, ValueError) as error:
        status = "%s: error: %s" % (script, error)
    except RuntimeError as error:
        if "can't start new thread" not in str(error):
            raise
        status = "%s: error: no more threads can be started: %s" % (script, THREAD_LIMIT)
    except KeyboardInterrupt:
        status = "%s: interrupted; no file is half written" % script
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends
        status = status or (READER_ENDED if error.errno == errno.EPIPE else
                            "%s: error: the output cannot be written: %s" % (script, error.strerror))
    if status:
        sys.exit(status)


# --- arguments --------------------------------------------------------------------------------------------------------

def number(kind, low, high=float("inf")):
    """Returns a type for argparse: a number of this kind (int or float) from low to high."""
    def convert(text):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if low <= value <= high and value < float("inf"):
                return value
        raise argparse.ArgumentTypeError("must be a %s of at least %g%s, not %r" % (
            "whole number" if kind is int else "number", low, "" if high == float("inf") else " and at most %g" % high, text))
    return convert


pixels = number(int, 1, 99999)  # a height or width


def in_order_or_by_name(parser, args, names, text):
    """Returns a script's required arguments. The guide of 2022 gives them in their order, the one of 2023 by name.

    names: the arguments' names in args. text: the error message if one is missing.
    """
    named = [getattr(args, name) for name in names]
    if args.positional and any(value is not None for value in named):
        parser.error("give the arguments either in their order or by name, not both")
    values = args.positional or named
    if len(values) != len(names) or None in values:
        parser.error(text)
    return values


# --- notes and progress -----------------------------------------------------------------------------------------------

def note(text):
    """Prints a note for the user, which is not an error, on stderr. Prints the same note only once."""
    if text not in seen_notes:
        seen_notes.add(text)
        print("note: %s" % text, file=sys.stderr)


def progress(total, unit):
    """Returns a progress bar that appears after two seconds. Without a terminal or tqdm, the bar shows nothing."""
    if not sys.stderr.isatty() or not has_module("tqdm"):
        return Silent()
    from tqdm import tqdm
    return tqdm(total=total, unit=unit, delay=2, leave=False)


class Silent(object):
    """A progress bar that shows nothing."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def update(self, count=1):
        pass


# --- text -------------------------------------------------------------------------------------------------------------

def one_line(error):
    """Returns an exception's text on one line."""
    return " ".join(str(error).split()) or repr(error)


def some(items, most=5):
    """Returns the first items as text, and how many more there are."""
    items = list(items)
    return ", ".join(items[:most]) + (" and %d more" % (len(items) - most) if len(items) > most else "")


def joined(items, separator=", "):
    """Returns the items as text, at most MAX_LISTED, so that the user can fix all of them at once."""
    return separator.join(items if len(items) <= MAX_LISTED else items[:MAX_LISTED] + ["..."])
