#!/bin/bash
# Two nodes of four GPUs under SLURM, one process a GPU: each process sees the GPU of its local number.
#
#   sbatch examples/slurm.sh rlhf_jax run --profile assignment
#   sbatch examples/slurm.sh gan_jax train --profile assignment
#
# Results lie on a file system that all nodes see (RLHF_RESULTS). Two minutes before its time is up
# the job saves what it has; submitted again, it goes on.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=02:00:00
#SBATCH --signal=TERM@120
export RLHF_HOSTS=auto
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}  # which srun does not take from above
srun "${PYTHON:-.venv/bin/python}" -m "$@"
