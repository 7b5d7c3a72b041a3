#!/bin/bash
# Starts a container: container.sh IMAGE apptainer exec --bind=... IMAGE COMMAND, or container.sh IMAGE srun ... COMMAND.
#
# Images have no scontrol. The worker needs it to requeue its job, and to tell a requeue from a cancellation. Inside, it finds a
# scontrol that writes its arguments to a named pipe; outside, the loop below runs the real one.
image=$1
shift
hash=
# The head of an image holds the id or the time of its build.
[ -f "$image" ] && hash=$({ stat --dereference --format=%s "$image"; head --bytes=65536 "$image"; } | sha256sum | cut -c1-12)
export LABCTL_CONTAINER="$image${hash:+ $hash}"

if [ -n "$SLURM_JOB_ID" ] && command -v scontrol >/dev/null && relay=$(mktemp -d -t labctl-scontrol.XXXXXX) && mkfifo "$relay/calls"; then
    cat >"$relay/scontrol" <<'SH'
#!/bin/sh
trap '' TERM # as below
answer="$(dirname "$0")/answer.$$"
echo "$answer $*" >"$(dirname "$0")/calls"
until [ -e "$answer" ]; do sleep 0.1; done
{ read -r status; cat; } <"$answer"
exit "$status"
SH
    chmod +x "$relay/scontrol"
    export LABCTL_SCONTROL=$relay
    (
        trap '' TERM USR2 # Slurm signals all processes of a job, and the worker asks after SIGTERM
        set -f
        # shellcheck disable=SC2086  # the words are several arguments
        while read -r answer words; do
            output=$(SLURM_TIME_FORMAT=standard scontrol $words 2>&1 </dev/null)
            printf '%s\n%s\n' $? "$output" >"$answer.part"
            mv "$answer.part" "$answer"
        done
        rm -rf "$relay"
    ) <"$relay/calls" >/dev/null 2>&1 &
    exec 9>"$relay/calls" # the loop reads end of file when the container has ended
    set -- "${@/#--bind=/--bind=$relay,}"
    set -- "${@/#--container-mounts=/--container-mounts=$relay:$relay,}"
fi

# exec: the container's runtime receives the job's signals, and passes them on to the worker.
[ "$1" = srun ] || exec "$@"

# srun would pass USR2 on to every process of the engine, which would end. The worker is the first process of the step.
trap 'kill -USR2 $(scontrol listpids "$SLURM_JOB_ID" "$SLURMD_NODENAME" | awk "\$3 ~ /^[0-9]+\$/ && \$4 == 0 { print \$1 }")' USR2
trap : TERM # every process of the job receives it
"$@" &
wait $!
while kill -0 $! 2>/dev/null; do wait $!; done
wait $! # its exit status, also after a signal ended the first wait
