#!/usr/bin/env bash
# A sweep on a Ray cluster of two hosts, the second of which loses its network after CUT seconds (never, if not given).
# The hosts are network namespaces of this machine, so this needs root and iproute2; everything between them crosses a network.
#   CUT=35 bash benchmarks/two_hosts.sh configs/sweep.yaml --out OUT --store STORE --limit 60
set -euo pipefail
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=${RAY_AUTH_TOKEN:-$(head -c 32 /dev/urandom | xxd -p -c 64)} # Both hosts and the driver need the same
export RAY_USAGE_STATS_ENABLED=0 RAY_raylet_start_wait_time_s=180
at() { ip netns exec "two-hosts-$1" "${@:2}"; }
temp=$(mktemp -d)
finish() { for i in 1 2; do ip netns pids two-hosts-$i | xargs -r kill -9; ip netns del two-hosts-$i; done; rm -rf "$temp"; }
trap finish EXIT
for i in 1 2; do ip netns add two-hosts-$i; done
ip link add th1 netns two-hosts-1 type veth peer name th2 netns two-hosts-2
for i in 1 2; do at $i ip addr add 10.99.0.$i/24 dev th$i; at $i ip link set th$i up; at $i ip link set lo up; done

at 1 ray start --head --node-ip-address=10.99.0.1 --port=6379 --num-cpus=1 --include-dashboard=false --temp-dir="$temp/1"
at 2 ray start --address=10.99.0.1:6379 --node-ip-address=10.99.0.2 --num-cpus=1 --temp-dir="$temp/2"
if [ -n "${CUT:-}" ]; then (sleep "$CUT"; at 2 ip link set th2 down; echo "cut off at $(date +%T)") & fi
at 1 merginguriel sweep "$@" --executor ray --address 10.99.0.1:6379
