#!/bin/bash
set -euo pipefail
HERE="$(dirname "$0")"
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
NNODES=${SLURM_NNODES:-2}
WORLD=$((GPUS_PER_NODE*NNODES))
TP=2; PP=$((WORLD/TP/2)); ((PP > 4)) && PP=4
EXTRA=""
export A=1 B="$HERE/x y"
TYPES=(p2p)
for _ in {1..3}; do TYPES+=(a2a a2a p2p); done
ARGS=(
  --foo 'a b' "$MODEL"  # comment
  --bar ${OUT}
  --empty "" $EXTRA "$EXTRA"
  --esc a\ b "c\"d\$e" $'t\tb' "multi
line"
)
ARGS[3]=changed
if [[ "${MODE:-a}" == "a" && -n $MODEL ]]; then ARGS+=(--q); elif [ -n "${Z:-}" ]; then echo; else ARGS+=(--r); fi
if [ "$PP" -eq 4 ] || [[ $MODEL =~ ^x ]]; then ARGS+=(--four); fi
OPTS="--one 1 \
  --two   2
  --three 3"
run() { local n=$1; shift; torchrun --nproc "$n" "$@"; }
run 8 pretrain_gpt.py "${ARGS[@]}" $OPTS "$@" ${EXTRA:+--x "$EXTRA"} ${OUT:+--y "$OUT/a b"} 2>&1 | tee /dev/null
case "$1" in "a b") F=1;; *) F=2;; esac
for ((i=0;i<3;i++)); do F+="$i"; done
python tools.py ${MODEL//m/n}/x ${#ARGS[@]} "${ARGS[*]}" "${ARGS[@]:1:2}" "${@:2}" $# "$F" ${ROOT##*/} ${A:-no}b pre"${TYPES[@]}"post ${TYPES[-1]} "${TYPES[$((1+1))]}" $A/$B.py $A$B.py
CMD="torchrun --nnodes $NNODES x.py ${TYPES[*]}"
$CMD
eval "$CMD --z 'a b'"
unset A
while (( $# )); do case $1 in c) C=1;; *) D="$1";; esac; shift; done
python "$C" "$D" ${N:=5} $N `basename /x/y.sh .sh`x $(basename /x/z.sh) "$(dirname /q/w)"/k
declare -A M=([a]=1 [b]=2); M[c]=3
python ${M[a]}${M[c]} "${X-unset}" "${MODEL%/*}" "${MODEL^^}"
{ python x; (cd /usr && python "$PWD"); python "$PWD"; } > /dev/null 2>&1
[ -z "${Q:-}" ] && Q=1 || Q=2
[ "$Q" != "1" ] && Q=4
[[ "$OUT" != /o* ]] || Q+=5
[ "$Q" -lt 45 ] || Q+=6
python $Q $((Q+1 > 2 ? 5 : 7)) $(( (3+4)*2 % 5 ))
cat <<EOF > /dev/null
torchrun not
EOF
while :; do python loop; break; done
python a=b --x=y "--z=${OUT}" {1..3} x{1..2} 
exec python last "$@"
python never
