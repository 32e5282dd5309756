"""Everything around the methods: experiments, runs, learner, executors, evaluation, command line. Knows no algorithm.

cli.py           the command line
experiment/      the schema, reading it from YAML, the checks before anything is loaded
run/             launch, the loop, and a run's folder, log, signals and trackers
roles/           what processes do: sample and score, learn
evaluation/      held-out evaluation, its statistics, the watch for reward hacking
executors/       where the roles run: this process, Ray actors, child processes for isolated rewards
finished/        commands on an existing run, and on names that experiments can use
prompt_policy/   `odeon prompt-policy`
"""
