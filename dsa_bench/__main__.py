"""`python -m dsa_bench` is the command `dsa-bench`."""

from dsa_bench.cli import main

if __name__ == "__main__":
    main()
