/// The publishes of one channel that the broker has not confirmed yet, by delivery tag: 1 for the channel's first, then
/// one more each (https://www.rabbitmq.com/docs/confirms). Confirms come in any order, for one tag or all up to it.
struct ConfirmWindow<Entry> {
    struct Slot {
        var entry: Entry
        var size: Int
        /// Why the broker gave it back. Its confirm comes all the same, after.
        var returned: String?
    }

    /// Slots of tags `first`, `first + 1`…; nil once confirmed.
    private var slots: [Slot?] = []
    /// Slots before this one are nil, and removed from time to time.
    private var head = 0
    private var first: UInt64 = 1

    private(set) var count = 0
    /// Sum of the sizes.
    private(set) var size = 0
    /// Taken out without a confirm since the channel was opened.
    private(set) var abandoned = 0

    var nextTag: UInt64 { first + UInt64(slots.count) }
    var oldest: Entry? { head < slots.count ? slots[head]?.entry : nil }

    /// As `nextTag`.
    mutating func append(_ entry: Entry, size entrySize: Int) {
        slots.append(Slot(entry: entry, size: entrySize))
        count += 1
        size += entrySize
    }

    mutating func markReturned(_ tag: UInt64, _ reason: String) {
        guard tag >= first, tag < nextTag else { return }
        slots[Int(tag - first)]?.returned = reason
    }

    /// The slots that this confirm settles, oldest first. Empty for a tag that is unknown or was settled before.
    mutating func confirm(_ tag: UInt64, isMultiple: Bool) -> [Slot] {
        // With `multiple`, tag 0 means all so far.
        let last = isMultiple && tag == 0 ? nextTag - 1 : tag
        guard last >= first, last < nextTag else { return [] }
        let end = Int(last - first)
        var settled: [Slot] = []
        for index in (isMultiple ? min(head, end) : end)...end {
            if let slot = slots[index] { settled.append(slot) }
            slots[index] = nil
        }
        forget(settled)
        return settled
    }

    /// Takes out the oldest while it satisfies the condition. Its confirm, when it comes, is ignored.
    mutating func removeOldest(where condition: (Entry) -> Bool) -> Entry? {
        guard head < slots.count, let slot = slots[head], condition(slot.entry) else { return nil }
        slots[head] = nil
        abandoned += 1
        forget([slot])
        return slot.entry
    }

    /// Empties it for a new channel.
    mutating func removeAll() -> [Entry] {
        let entries = slots[head...].compactMap { $0?.entry }
        self = ConfirmWindow()
        return entries
    }

    private mutating func forget(_ settled: [Slot]) {
        count -= settled.count
        size -= settled.reduce(0) { $0 + $1.size }
        while head < slots.count, slots[head] == nil { head += 1 }
        if head == slots.count || head >= 1024 {
            slots.removeFirst(head)
            first += UInt64(head)
            head = 0
        }
    }
}
