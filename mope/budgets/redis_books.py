"""Books on a Redis server that replicas share. Each call is one script: done as a whole or not at all.

All keys carry the hash tag {NAMESPACE}, so that they lie in one slot of a cluster:

    mope:{NAMESPACE}:budget:open               a sorted set: open reservations by the time at which they expire
    mope:{NAMESPACE}:budget:windows            a sorted set: keys of windows by their end
    mope:{NAMESPACE}:budget:clients            a set: all clients
    mope:{NAMESPACE}:budget:hold:ID            a hash: a reservation
    mope:{NAMESPACE}:budget:due:CLIENT         a sorted set: its open reservations by their expected end
    mope:{NAMESPACE}:budget:window:CLIENT:S    a hash: what it used and holds in the window that began at S
    mope:{NAMESPACE}:budget:totals:CLIENT      a hash: see `Totals`

The clock is the server's. Totals are never numbers in Lua, which are exact up to 2^53 only: HINCRBY adds texts in 64
bits. What a kill of the server loses is up to its persistence: nothing with `appendonly yes` and `appendfsync always`,
up to a second with `everysec`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import Any

from typing_extensions import override

from mope.budgets.books import DUE_LOOKED_AT, KEPT_S, Books, Decision, Hold, Settlement, Totals, wait_of
from mope.budgets.risk import HIGHEST, LOWEST, STEP
from mope.errors import StoreError
from mope.extras import require
from mope.fairness.redis_scripts import Script, script
from mope.fairness.stores import StoreConfig, shown

# what all scripts begin with; KEYS open; ARGV prefix seconds-to-keep ...
_BEGIN = (
    f"local STEP, LOWEST, HIGHEST = {STEP}, {LOWEST}, {HIGHEST}"
    + """
local open, prefix, kept = KEYS[1], ARGV[1], tonumber(ARGV[2])
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1000000
local windows, clients = prefix .. 'windows', prefix .. 'clients'
local function minus(amount) return amount == '0' and '0' or '-' .. amount end
local function count(client, ...)
  local fields = {...}
  for i = 1, #fields, 2 do redis.call('HINCRBY', prefix .. 'totals:' .. client, fields[i], fields[i + 1]) end
end
local function move(window, field, amount)
  if redis.call('EXISTS', window) == 1 then redis.call('HINCRBY', window, field, amount) end
end
local function close(id, hold, client)
  redis.call('ZREM', open, id)
  redis.call('ZREM', prefix .. 'due:' .. client, id)
  redis.call('PEXPIRE', hold, math.ceil(kept * 1000))
end
local function clip(odds) return math.min(math.max(odds, LOWEST), HIGHEST) end
local function log_odds(level) return clip(math.log(level / (1 - level))) end
local function sweep(most)
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', open, '-inf', now, 'LIMIT', 0, most)) do
    local hold = prefix .. 'hold:' .. id
    local found = redis.call('HMGET', hold, 'client', 'window', 'amount')
    if found[1] then
      redis.call('HSET', hold, 'state', 'expired')
      move(found[2], 'held', minus(found[3]))
      count(found[1], 'held', minus(found[3]), 'expired', found[3], 'num_expired', 1)
      close(id, hold, found[1])
    else
      redis.call('ZREM', open, id)
    end
  end
  for _, window in ipairs(redis.call('ZRANGEBYSCORE', windows, '-inf', now, 'LIMIT', 0, most)) do
    local found = redis.call('HMGET', window, 'client', 'allowed', 'used', 'held', 'risk')
    if not found[1] then
      redis.call('ZREM', windows, window)
    elseif found[4] == '0' then
      local over = tonumber(found[3]) > tonumber(found[2]) and 1 or 0
      count(found[1], 'windows', 1, 'windows_over', over)
      local totals, risk = prefix .. 'totals:' .. found[1], tonumber(found[5])
      local odds = tonumber(redis.call('HGET', totals, 'odds') or '') or log_odds(1 - risk)
      redis.call('HSET', totals, 'odds', string.format('%.9f', clip(odds + STEP * (over - risk))))
      redis.call('ZREM', windows, window)
      redis.call('PEXPIRE', window, math.ceil(kept * 1000))
    end
  end
end
"""
)

# ARGV ... id client amount refund due_s hold_s limit window_s most-refunds note risk
# -> state, used, held, seconds to the window's end, log odds of the level or empty, then pairs: seconds to a refund,
#    and its amount
RESERVE = script(
    _BEGIN
    + """
local id, client, amount, limit, length = ARGV[3], ARGV[4], ARGV[5], ARGV[9], tonumber(ARGV[10])
sweep(100)
local starts = math.floor(now / length) * length
local left = string.format('%.6f', starts + length - now)
local window = prefix .. 'window:' .. client .. ':' .. string.format('%.3f', starts)
redis.call('SADD', clients, client)
redis.call('HSETNX', window, 'used', 0)
redis.call('HSETNX', window, 'held', 0)
redis.call('HSET', window, 'client', client, 'allowed', limit, 'risk', ARGV[13])
redis.call('ZADD', windows, string.format('%.6f', starts + length), window)
local odds = redis.call('HGET', prefix .. 'totals:' .. client, 'odds') or ''
local used, held = unpack(redis.call('HMGET', window, 'used', 'held'))
local hold = prefix .. 'hold:' .. id
local before = redis.call('HMGET', hold, 'client', 'state')
if before[1] then
  return {before[1] == client and before[2] == 'open' and 'known' or 'used', used, held, left, odds}
end
if tonumber(used) + tonumber(held) + tonumber(amount) > tonumber(limit) then
  count(client, 'num_full', 1)
  local reply = {'full', used, held, left, odds}
  for _, other in ipairs(redis.call('ZRANGE', prefix .. 'due:' .. client, 0, tonumber(ARGV[11]) - 1)) do
    local found = redis.call('HMGET', prefix .. 'hold:' .. other, 'window', 'due', 'refund')
    if found[1] == window then
      reply[#reply + 1] = string.format('%.6f', math.max(tonumber(found[2]) - now, 0))
      reply[#reply + 1] = found[3]
    end
  end
  return reply
end
local due = string.format('%.6f', now + tonumber(ARGV[7]))
redis.call('HSET', hold, 'client', client, 'window', window, 'amount', amount, 'refund', ARGV[6], 'due', due,
  'state', 'open', 'used', 0, 'note', ARGV[12])
redis.call('ZADD', open, string.format('%.6f', now + tonumber(ARGV[8])), id)
redis.call('ZADD', prefix .. 'due:' .. client, due, id)
held = redis.call('HINCRBY', window, 'held', amount)
count(client, 'reserved', amount, 'held', amount, 'num_reserved', 1)
return {'held', used, redis.call('HGET', window, 'held'), left, odds}
"""
)

# ARGV ... id used -> state, reserved, used, client
SETTLE = script(
    _BEGIN
    + """
local id, used = ARGV[3], ARGV[4]
local hold = prefix .. 'hold:' .. id
local client, window, amount, state, before = unpack(
  redis.call('HMGET', hold, 'client', 'window', 'amount', 'state', 'used'))
if not client then return {'unknown', '0', used, ''} end
if state == 'settled' then return {'already', amount, before, client} end
if state == 'open' then
  move(window, 'held', minus(amount))
  count(client, 'held', minus(amount))
else
  count(client, 'expired', minus(amount), 'num_expired', -1)
end
move(window, 'used', used)
count(client, 'settled', amount, 'used', used, 'num_settled', 1)
redis.call('HSET', hold, 'state', 'settled', 'used', used)
close(id, hold, client)
return {state == 'open' and 'settled' or 'late', amount, used, client}
"""
)

# -> clients and their totals, in turn
TOTALS = script(
    _BEGIN
    + """
sweep(10000)
local reply = {}
for _, client in ipairs(redis.call('SMEMBERS', clients)) do
  reply[#reply + 1] = client
  reply[#reply + 1] = redis.call('HGETALL', prefix .. 'totals:' .. client)
end
return reply
"""
)


class RedisBooks(Books):
    """See the module. A call is one round trip. A connection that broke is mended by the next call.

    Args:
        url: of the server.
        config: namespace and patience.
        kept_s: seconds that a closed reservation is remembered.

    Raises:
        MissingExtraError: the package `redis` is not installed.
        StoreError: the URL cannot be used.
    """

    def __init__(self, url: str, config: StoreConfig, *, kept_s: float = KEPT_S) -> None:
        redis = require("redis.asyncio", "budgets on a Redis server", "redis")
        errors = require("redis.exceptions", "budgets on a Redis server", "redis")
        self._unknown_script = errors.NoScriptError
        self._failures = (errors.RedisError, OSError, TimeoutError)
        self._prefix = f"mope:{{{config.namespace}}}:budget:"
        self._kept_s, self._shown = kept_s, shown(config.url)
        try:
            self._client = redis.from_url(
                url,
                socket_timeout=config.timeout_s,
                socket_connect_timeout=config.timeout_s,
                protocol=2,
                client_name="mope",
            )
        except (ValueError, TypeError):  # whose text may hold a part of the password
            raise StoreError(
                f"books {self._shown}: the URL can't be read; expected redis://USER:PASSWORD@HOST:PORT/DB, with / as "
                "%2F, # as %23 and @ as %40 in a password"
            ) from None

    @override
    async def reserve(self, hold: Hold) -> Decision:
        amounts = (hold.amount, hold.refund, hold.due_s, hold.hold_s, hold.limit, hold.window_s)
        state, used, held, left, odds, *rest = await self._run(
            RESERVE, hold.id, hold.client, *amounts, DUE_LOOKED_AT, hold.note, hold.risk
        )
        window_s, wait_s = float(left), 0.0
        if state == b"full":
            refunds = [(float(due), int(amount)) for due, amount in zip(rest[::2], rest[1::2], strict=True)]
            lack = int(used) + int(held) + hold.amount - hold.limit
            wait_s = wait_of(lack, refunds, window_s, fits=hold.amount <= hold.limit)
        known = float(odds) if odds else None
        return Decision(state.decode(), int(used), int(held), wait_s, window_s, known)

    @override
    async def note(self, name: str) -> str | None:
        found = await self._told(self._client.hget(f"{self._prefix}hold:{name}", "note"))
        return None if found is None else found.decode()

    @override
    async def settle(self, name: str, used: int) -> Settlement:
        state, reserved, took, client = await self._run(SETTLE, name, used)
        return Settlement(state.decode(), int(reserved), int(took), client.decode())

    @override
    async def totals(self) -> dict[str, Totals]:
        reply = await self._run(TOTALS)
        found = {}
        for client, fields in zip(reply[::2], reply[1::2], strict=True):
            values = dict(zip((name.decode() for name in fields[::2]), fields[1::2], strict=True))
            found[client.decode()] = Totals(**{name: int(values.get(name, 0)) for name in Totals._fields})
        return dict(sorted(found.items()))

    @override
    async def close(self) -> None:
        await self._client.aclose()

    async def _run(self, asked: Script, *arguments: str | float) -> Sequence[Any]:
        values = (f"{self._prefix}open", self._prefix, self._kept_s, *arguments)
        reply: Sequence[Any]
        try:
            reply = await self._told(self._client.evalsha(asked.digest, 1, *values))
        except self._unknown_script:
            reply = await self._told(self._client.eval(asked.text, 1, *values))
        return reply

    async def _told(self, reply: Awaitable[Any]) -> Any:
        try:
            return await reply
        except self._unknown_script:
            raise
        except self._failures as error:
            raise StoreError(f"books {self._shown}: {str(error) or type(error).__name__}") from error
