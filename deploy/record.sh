#!/bin/sh
# Follows the log into a file of JSON lines, from the record with which the last run ended: that
# record's events may be there twice, and none is missing that the log still had. A run that was
# killed may leave half a line.
file=/recordings/${DYN_NAMESPACE:-dynamo}.jsonl
if [ -n "$(tail -c 1 "$file" 2>/dev/null)" ]; then
  echo >>"$file"
fi
last=$(tail -n 1 "$file" 2>/dev/null | sed -n 's/^{"seq": *\([0-9][0-9]*\).*/\1/p')
exec python -m eventstore tail --follow --json --from-seq "${last:-1}" >>"$file"
