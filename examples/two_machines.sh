# sh examples/two_machines.sh
#
# A server and two clients as processes of their own, with TLS and keys, on this machine (localhost); on three machines
# the commands are the same, with the server's name in place of localhost: docs/federation.md. It needs
# `pip install 'fedloom[flower]'`. Everything lands in the new folder two_machines.
set -e
PORT=${PORT:-9092}
mkdir two_machines
cd two_machines

# The coordinator: certificates, and the allowed members. A key stays with its client, which sends
# NAME.pub.
fedloom certs --host localhost
for site in north south; do
  fedloom keys new $site.key
  fedloom members allow $site $site.pub
done
fedloom server start --host 127.0.0.1 --port "$PORT" > server.log 2>&1 &
trap 'fedloom client leave --home north; fedloom client leave --home south; fedloom server stop; wait' EXIT
until grep -qs "clients can join" server.log; do sleep 1; done

# Each client: its rows, which stay where they are.
for site in north south; do
  for number in $(seq 40); do
    echo "{\"prompt\": \"Where is box $number?\", \"completion\": \" Box $number is in the $site.\"}"
  done > $site.jsonl
  printf '[data]\nsource = "%s.jsonl"\nkind = "instruction"\n' $site > $site.toml
  fedloom client join --server localhost:"$PORT" --ca fedloom-server/ca.pem --key $site.key --data $site.toml \
    --home $site > $site.log 2>&1 &
done

# The coordinator again: an experiment, which names no rows but its own held-out ones.
head -n 10 north.jsonl > held_out.jsonl
cat > experiment.toml <<'END'
[data]
source = "clients"
kind = "instruction"
test_source = "held_out.jsonl"

[objective]
name = "sft"

[federation]
rounds = 2

[training]
learning_rate = 3e-3
END
fedloom run experiment.toml --engine flower --quiet
fedloom audit verify runs/experiment
