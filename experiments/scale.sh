# Sourced by the table scripts: from SCALE to the data and the length of every run.
#
#   SCALE=demo    minutes on a laptop: the offline demo, its own model and its groups of four (the default)
#   SCALE=260K    CHECKPOINT=stories260K.bin TOKENIZER=tok512.model: 4,096 stories of the published model, an hour on 2 cores
#   SCALE=110M    CHECKPOINT=stories110M.pt TOKENIZER=tokenizer.model: the paper's sizes, days on one GPU
#
# The paper: 100,000 stories of the 110M model, groups of four, batches of 32 groups, 32 online samples every 8 steps,
# 5,000 steps of warm-up, a judgement of 1,000 stories every 1,000 steps. It does not print its learning rates.
SCALE=${SCALE:-demo}
case "$SCALE" in
    demo) flags=(--max_iters=60 --eval_interval=20) ;;
    260K) flags=(--max_iters=60 --eval_interval=20 --learning_rate=4e-5); stories=4096 ;;
    110M) flags=(--max_iters=20000 --eval_interval=1000 --eval_stories=500 --learning_rate=1e-6 --train_flags=--warmup_iters=5000)
          stories=100000 ;;
    *) echo "SCALE=$SCALE: choose demo, 260K or 110M" >&2; exit 2 ;;
esac
if [ "$SCALE" != demo ]; then
    : "${CHECKPOINT:?the model to align, a .pt or a llama2.c .bin}" "${TOKENIZER:?its sentencepiece model}"
    mkdir -p "data/$SCALE"
    ranked="data/$SCALE/ranked.jsonl"
    if [ ! -f "$ranked" ]; then
        python tinystories_data.py generate --checkpoint="$CHECKPOINT" --tokenizer="$TOKENIZER" \
            --num_stories="$stories" --out="data/$SCALE/stories.jsonl"
        python tinystories_data.py rank --stories="data/$SCALE/stories.jsonl" --out="$ranked" --group_size=4
    fi
    flags+=(--init_from="$CHECKPOINT" --tokenizer="$TOKENIZER" --data="$ranked")
fi
