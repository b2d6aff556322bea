"""`python -m reft_cli`, which is what launchers start."""

from reft_cli.cli.app import main

if __name__ == "__main__":
    main()
