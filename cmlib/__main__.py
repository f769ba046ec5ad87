"""``python -m cmlib``: the kit's commands, usable before anything is installed.

Only syntax that every Python 3 reads stands here, so that an old one answers with a sentence, not with a SyntaxError.
"""

import sys


def version_error(version, executable):
    """What to tell somebody whose Python is too old; nothing where it will do."""
    if tuple(version) >= (3, 11):
        return None
    return (
        "cmlib: needs Python 3.11 or newer, and {} is {}.{}; call a newer one by its name, "
        "as in 'python3.12 -m cmlib lab' or 'make lab PYTHON=python3.12'"
    ).format(executable or "this Python", version[0], version[1])


if __name__ == "__main__":
    error = version_error(sys.version_info[:2], sys.executable)
    if error:
        sys.exit(error)

    from cmlib.house import main

    sys.exit(main(sys.argv[1:]))
