"""Everything around the methods: experiments, runs, learner, executors, evaluation, command line. Knows no algorithm.

cli.py           the command line
experiment/      the schema, the YAML that fills it, the checks before anything is loaded
run/             launch, the loop, and a run's folder, log, signals and trackers
roles/           what processes do: draw and score, learn
evaluation/      held-out evaluation, its statistics, the watch for reward hacking
executors/       where the roles live: this process, Ray actors, child processes for isolated rewards
finished/        commands on an existing run, and on the names an experiment can use
prompt_policy/   `odeon prompt-policy`
"""
