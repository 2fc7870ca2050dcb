"""python -m snakemake_executor_plugin_submitit unlock"""

import sys

from snakemake_executor_plugin_submitit.unlock import remove_stale_locks

if sys.argv[1:] != ["unlock"]:
    sys.exit(f"usage: {__doc__}")
if remove_stale_locks():
    print("Removed the lock of a killed Snakemake process.")
