"""What a Redis server does for a namespace, each script as a whole or not at all.

All keys of a namespace carry the hash tag {NAMESPACE}, so that they lie in one slot of a cluster:

    mope:{NAMESPACE}:totals        a hash: `["acme","alice"]` -> what all replicas charged that client, as an integer;
                                   `b["acme","alice"]` -> mark of when it was listed; `(forgotten)` -> what clients were
                                   charged that are not listed any more; `@REPLICA` -> number and
                                   session of its last batch, and its session now; `epoch`, `version`,
                                   `created`, `evicted`, `seen`: the latest time of all greetings
    mope:{NAMESPACE}:changes       a sorted set: clients by the version at which their totals last changed
    mope:{NAMESPACE}:told:REPLICA  a hash: what of the totals is this replica's

Totals and the numbers of batches are fields of one hash because that can be lost as a whole, but not in part.

Numbers of Lua are doubles, exact up to 2^53 only. So no amount is ever a number in Lua: replicas send increments as
texts, and HINCRBY adds them in 64 bits. A total that would leave these is refused, and the refusal counted. After the
first write of a script nothing raises, since what was written would stay.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple


class Script(NamedTuple):
    """A script, and the digest by which a server that has seen it knows it."""

    text: str
    digest: str


def script(text: str) -> Script:
    """A script and its digest."""
    return Script(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


# A replica begins a session: commands of earlier ones, still on their way, are void from now on.
# KEYS totals changes told; ARGV @replica session epoch-if-there-is-none seconds-to-keep-told
# -> epoch, whether `told` is there, number and session of the last batch, age of the namespace in seconds, which is
#    endless when the server's clock was set back, since then nobody knows
HELLO = script("""
local totals, changes, told = KEYS[1], KEYS[2], KEYS[3]
local replica, session = ARGV[1], ARGV[2]
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1000000
local epoch = redis.call('HGET', totals, 'epoch')
if not epoch then
  epoch = ARGV[3]
  redis.call('DEL', totals, changes)
  redis.call('HSET', totals, 'epoch', epoch, 'version', 0, 'evicted', 0, 'created', string.format('%.6f', now))
end
local told_epoch = redis.call('HGET', told, 'epoch')
if told_epoch and told_epoch ~= epoch then
  redis.call('DEL', told)
  told_epoch = false
end
local state = redis.call('HGET', totals, replica)
local last = state and string.match(state, '^%d+ %S+') or '0 -'
if not state and not told_epoch then
  redis.call('HSET', told, 'epoch', epoch)
  told_epoch = epoch
end
redis.call('HSET', totals, replica, last .. ' ' .. session)
redis.call('EXPIRE', told, ARGV[4])
local created = tonumber(redis.call('HGET', totals, 'created') or '') or 0
local seen = tonumber(redis.call('HGET', totals, 'seen') or '') or created
local age = now - created
if now + 1 < seen then
  age = 1000000000000
elseif now > seen then
  redis.call('HSET', totals, 'seen', string.format('%.6f', now))
end
return {epoch, told_epoch and 1 or 0, last, string.format('%.6f', age)}
""")

# A replica tells a batch, unless it was told already, and reads a page of what changed.
# KEYS totals changes told; ARGV @replica session batch cursor page max-clients seconds-to-keep-told num-moves
# moves... (client amount)...
# -> lost, or: ok, refusals, highest version that was evicted, clients and versions, totals and marks
TELL = script("""
local totals, changes, told = KEYS[1], KEYS[2], KEYS[3]
local batch, page, most = tonumber(ARGV[3]), tonumber(ARGV[5]), tonumber(ARGV[6])
local keep, moves = ARGV[7], tonumber(ARGV[8])
local last, session = string.match(redis.call('HGET', totals, ARGV[1]) or '', '^(%d+) %S+ (%S+)$')
if session ~= ARGV[2] or redis.call('HEXISTS', told, 'epoch') == 0 then return {'lost'} end
last = tonumber(last)
if batch ~= last and batch ~= last + 1 then return {'lost'} end
local refused = 0
local function add(key, field, amount)
  local reply = redis.pcall('HINCRBY', key, field, amount)
  if type(reply) == 'table' and reply.err then refused = refused + 1 end
  return reply
end
if batch == last + 1 then
  redis.call('HSET', totals, ARGV[1], ARGV[3] .. ' ' .. session .. ' ' .. session)
  for position = 9, 8 + moves do
    local amount = redis.call('HGET', told, ARGV[position])
    if amount then
      redis.call('HDEL', told, ARGV[position])
      add(told, '(forgotten)', amount)
    end
  end
  local first = 9 + moves
  local clients = (#ARGV - first + 1) / 2
  local version = redis.call('HINCRBY', totals, 'version', clients) - clients
  for position = first, #ARGV, 2 do
    local client, amount = ARGV[position], ARGV[position + 1]
    version = version + 1
    if client ~= '(forgotten)' then
      if redis.call('HEXISTS', totals, client) == 0 then
        redis.call('HSET', totals, client, 0, 'b' .. client, session .. ':' .. ARGV[3])
      end
      redis.call('ZADD', changes, version, client)
    end
    add(totals, client, amount)
    if add(told, client, amount) == 0 then redis.call('HDEL', told, client) end
  end
  local excess = redis.call('ZCARD', changes) - most
  if excess > 0 then
    local oldest = redis.call('ZPOPMIN', changes, math.min(excess, 1000))
    for position = 1, #oldest, 2 do
      local client = oldest[position]
      local amount = redis.call('HGET', totals, client)
      if amount then
        redis.call('HDEL', totals, client, 'b' .. client)
        add(totals, '(forgotten)', amount)
      end
    end
    redis.call('HSET', totals, 'evicted', oldest[#oldest])
  end
end
if keep ~= '0' then redis.call('EXPIRE', told, keep) end
local found = redis.call('ZRANGEBYSCORE', changes, '(' .. ARGV[4], '+inf', 'WITHSCORES', 'LIMIT', 0, page)
local fields, values = {}, {}
for position = 1, #found, 2 do
  fields[#fields + 1] = found[position]
  fields[#fields + 1] = 'b' .. found[position]
end
if #fields > 0 then values = redis.call('HMGET', totals, unpack(fields)) end
return {'ok', refused, redis.call('HGET', totals, 'evicted'), found, values}
""")

# A replica goes and will tell nothing any more: its share stays in the totals.
# KEYS totals told; ARGV @replica session -> whether it was known
FAREWELL = script("""
if string.match(redis.call('HGET', KEYS[1], ARGV[1]) or '', '^%d+ %S+ (%S+)$') ~= ARGV[2] then return 0 end
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('DEL', KEYS[2])
return 1
""")
