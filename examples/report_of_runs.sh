# sh examples/report_of_runs.sh
#
# Three runs that differ in one setting, and one page that compares them. Everything lands in the new folder
# report_of_runs.
set -e
mkdir report_of_runs
cd report_of_runs

fedloom init experiment.toml
for rank in 2 4 8; do
  fedloom run experiment.toml --set adapter.rank=$rank --set data.builtin_rows=200 --set federation.clients=2 \
    --set federation.rounds=1 --set output.folder=rank-$rank --quiet
done
fedloom report rank-2 rank-4 rank-8 --to ranks.html
