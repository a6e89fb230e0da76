import CLinux
import FoundationEssentials
import Glibc
import HostKit
import MigrationModel

/// What `flotilla gpu prepare` did to this host, and the way back. Originals are kept, synced, before a file changes.
package struct PreparedHost: Sendable {
    struct Entry: Codable {
        var path: String
        /// Bytes of before the first change; nil: the file was not there.
        var original: Data?
        var mode: UInt32
        /// SHA-256 of what was written last.
        var written: String
    }

    struct Record: Codable {
        var version = 1
        var entries: [Entry] = []
        /// Made for the files, below the root, parents first; nil in records of earlier versions.
        var folders: [String]?
        /// Still to run, after a crash or a failure too.
        var commands: [[String]] = []
        /// Boot entries that were as written here, or as they were before, when the programs began, which write them anew.
        /// Nil: none is under way.
        var rewritable: [String]?
    }

    private let root: String
    private let path: String
    private let run: (@Sendable ([String]) throws -> Void)?

    /// - Parameters:
    ///   - root: "" for this host.
    ///   - run: runs an argument vector; nil: somebody else does, later.
    package init(root: String, run: (@Sendable ([String]) throws -> Void)? = PreparedHost.runProgram) {
        self.root = root
        path = "\(root)\(GPULedger.folder)/prepared.json"
        self.run = run
    }

    /// Whether this host was started since something was written last.
    ///
    /// - Parameter stat: what /proc/stat says.
    package func isStartedSince(_ stat: String) -> Bool {
        let line = stat.split(separator: "\n").first { $0.hasPrefix("btime ") }
        guard let start = line.flatMap({ Int($0.dropFirst(6)) }), let status = try? File(path, O_RDONLY).status()
        else { return false }
        return status.st_mtim.tv_sec < start
    }

    /// Programs that an earlier run could not finish.
    package func pending() throws -> [[String]] { try read().commands }

    /// Writes the files and runs the programs. Nothing to change and nothing left over: does nothing.
    ///
    /// - Throws: `failedPrecondition`, with nothing changed, when another process is at it, a file changed since `setup`
    ///   was made or is a link out of the root; with a program that failed the files are written, and the next run tries it again.
    package func apply(_ setup: HostSetup) throws {
        try exclusively { try write(setup) }
    }

    private func write(_ setup: HostSetup) throws {
        for change in setup.changes where content(of: change.path) != change.before {
            throw MigrationError(
                .failedPrecondition, "\(root)\(change.path) was changed by somebody else just now",
                hint: "run the same command again")
        }
        for change in setup.changes { _ = try target(of: change.path) }
        var record = try read()
        for change in setup.changes {
            guard let after = change.after else { continue }
            let digest = hex(Digest.hash(.sha256, after))
            let entry = Entry(
                path: change.path, original: change.before.map { Data($0) },
                mode: mode(of: change.path) ?? change.mode, written: digest)
            guard let index = record.entries.firstIndex(where: { $0.path == change.path }) else {
                record.entries.append(entry)
                continue
            }
            let known = record.entries[index]
            let before = change.before.map { hex(Digest.hash(.sha256, $0)) }
            if before == known.written || entry.original == known.original
                || record.rewritable?.contains(change.path) == true || HostSetup.own.contains(change.path)
            {
                record.entries[index].written = digest
            } else {
                // Somebody else wrote it since; that is what there is to return to.
                record.entries[index] = entry
            }
        }
        record.commands += setup.commands.filter { !record.commands.contains($0) }
        guard !setup.changes.isEmpty || !record.commands.isEmpty else { return }
        record.folders = missingFolders(for: setup.changes.map(\.path), besides: record.folders ?? [])
        try Files.createDirectories(Files.parent(of: path), mode: 0o700)
        try write(record)
        for change in setup.changes {
            try put(change.path, change.after, mode: mode(of: change.path) ?? change.mode)
        }
        try finish(&record, checking: setup)
    }

    /// What was written, and every boot entry.
    private func bootFiles(_ record: Record) -> [String: [UInt8]] {
        let paths = Set(record.entries.map(\.path)).union(HostSetup.entries(below: root))
        return Dictionary(uniqueKeysWithValues: paths.compactMap { path in content(of: path).map { (path, $0) } })
    }

    /// What was made must have the words, or the next boot does without them.
    private func checkGRUB(_ setup: HostSetup, _ command: [String]) throws {
        guard run != nil, let made = HostSetup.grubConfiguration(of: command, below: root),
            let bytes = content(of: made, limit: 1 << 24),
            let entry = setup.entriesWithout(inGRUB: String(decoding: bytes, as: UTF8.self)).first
        else { return }
        throw MigrationError(
            .internal,
            "\(root)\(made), which \(command.joined(separator: " ")) has written, lacks what was added, or has what "
                + "undoes it: \(entry)",
            hint: setup.wordsHint
                + " where that program has the kernel's command line from, then run the same command again")
    }

    /// The program, and what an earlier run of it began, may have written boot entries anew, from what it takes for the
    /// kernel's command line.
    private func check(
        _ setup: HostSetup, _ before: [String: [UInt8]], _ command: [String], _ record: inout Record
    ) throws {
        for (path, now) in bootFiles(record).sorted(by: { $0.key < $1.key }) {
            let isRewritten = now != before[path]
            guard !isRewritten || setup.isMet(path, by: String(decoding: now, as: UTF8.self)) else {
                throw MigrationError(
                    .internal,
                    "\(root)\(path) was written anew, without what was added or with what undoes it, while "
                        + "\(command.joined(separator: " ")) ran",
                    hint: setup.wordsHint + " where it has the kernel's command line from (/etc/kernel/cmdline, or "
                        + "kernelstub's configuration), then run the same command again")
            }
            if let index = record.entries.firstIndex(where: { $0.path == path }),
                isRewritten || record.rewritable?.contains(path) == true
            {
                record.entries[index].written = hex(Digest.hash(.sha256, now))
            }
        }
    }

    /// The changes that take everything back, to the byte. The boot entry of a kernel that was removed since stays away.
    ///
    /// - Throws: `failedPrecondition` naming each file that somebody else changed since.
    package func reverting() throws -> [HostSetup.FileChange] {
        let record = try read()
        var changed: [String] = []
        let changes = record.entries.compactMap { entry -> HostSetup.FileChange? in
            let now = content(of: entry.path)
            let original = entry.original.map { [UInt8]($0) }
            if now == original { return nil }
            if now == nil, HostSetup.entryFolders.contains(Files.parent(of: entry.path)) { return nil }
            // A file that is gone needs nothing but to come back.
            if let now, !isOwn(now, entry, record) { changed.append(entry.path) }
            return HostSetup.FileChange(path: entry.path, before: now, after: original, mode: entry.mode)
        }
        guard changed.isEmpty else {
            throw MigrationError(
                .failedPrecondition, "changed by somebody else since: \(changed.joined(separator: ", "))",
                hint: "undo that change first; the originals are in \(path)")
        }
        return changes
    }

    /// Boot entries with words of `flotilla gpu prepare` that it did not write, and reverting does not change: mostly of
    /// kernels that were installed since. Empty when nothing is prepared.
    package func entriesOfOthers() throws -> [String] {
        let own = try read().entries.map(\.path)
        guard !own.isEmpty else { return [] }
        return HostSetup.entries(below: root).filter { path in
            guard !own.contains(path), let bytes = content(of: path) else { return false }
            return KernelParameters.areSome(inEntry: String(decoding: bytes, as: UTF8.self))
        }
    }

    /// - Parameter commands: programs that carry the change into the boot, those of `HostSetup`.
    /// - Throws: `failedPrecondition`, with nothing changed, when another process is at it.
    package func revert(commands: [[String]]) throws {
        try exclusively { try takeBack(commands) }
    }

    private func takeBack(_ commands: [[String]]) throws {
        // Nothing was ever prepared.
        guard Files.exists(path) else { return }
        let changes = try reverting()
        for change in changes { _ = try target(of: change.path) }
        var record = try read()
        record.commands += commands.filter { !record.commands.contains($0) }
        try write(record)
        for change in changes { try put(change.path, change.after, mode: change.mode) }
        try finish(&record)
        // Boot entries that a program wrote anew meanwhile.
        for entry in record.entries where record.rewritable?.contains(entry.path) == true {
            let original = entry.original.map { [UInt8]($0) }
            guard let now = content(of: entry.path), now != original else { continue }
            try put(entry.path, original, mode: entry.mode)
        }
        let made = (record.folders ?? []).reversed().map { "\(root)\($0)" }
        let ownFolders = made.filter { path.hasPrefix("\($0)/") }
        for folder in made where !ownFolders.contains(folder) { try Files.removeDirectoryIfEmpty(folder) }
        try Files.remove(path)
        for folder in ownFolders { try Files.removeDirectoryIfEmpty(folder) }
    }

    // MARK: -

    /// One process at a time: of two the second would write over what the first noted. The root itself is locked, so that
    /// nothing stays behind.
    private func exclusively(_ body: () throws -> Void) throws {
        guard let lock = try FileLock(ifFree: root.isEmpty ? "/" : root) else {
            throw MigrationError(
                .failedPrecondition,
                "another `flotilla gpu prepare` is at work on \(root.isEmpty ? "this host" : root)",
                hint: "run the same command again when that has ended")
        }
        try withExtendedLifetime(lock, body)
    }

    private func content(of path: String, limit: Int = 1 << 20) -> [UInt8]? {
        try? Files.read("\(root)\(path)", limit: limit)
    }

    /// Folders that these files and the record need and that are not there, with those that were made before.
    private func missingFolders(for paths: [String], besides made: [String]) -> [String] {
        var missing = Set(made)
        for path in paths + [String(path.dropFirst(root.count))] {
            var folder = Files.parent(of: path)
            while folder != "/", !Files.exists("\(root)\(folder)") {
                missing.insert(folder)
                folder = Files.parent(of: folder)
            }
        }
        return missing.sorted()
    }

    /// Runs the programs. One is done when what it made has been looked at.
    private func finish(_ record: inout Record, checking setup: HostSetup? = nil) throws {
        guard !record.commands.isEmpty else { return try write(record) }
        record.rewritable = record.entries.filter { entry in
            guard HostSetup.entryFolders.contains(Files.parent(of: entry.path)) else { return false }
            guard let now = content(of: entry.path) else { return false }
            return now == entry.original.map { [UInt8]($0) } || isOwn(now, entry, record)
        }.map(\.path)
        try write(record)
        while let command = record.commands.first {
            let before = bootFiles(record)
            try run?(command)
            if let setup {
                try check(setup, before, command, &record)
                try checkGRUB(setup, command)
            }
            record.commands.removeFirst()
            if setup != nil, record.commands.isEmpty { record.rewritable = nil }
            try write(record)
        }
    }

    /// Whether nobody but this program, and those it ran, wrote these bytes.
    private func isOwn(_ bytes: [UInt8], _ entry: Entry, _ record: Record) -> Bool {
        hex(Digest.hash(.sha256, bytes)) == entry.written || record.rewritable?.contains(entry.path) == true
    }

    /// A link stays a link: what it leads to changes. Throws `failedPrecondition` for one out of another root.
    private func target(of path: String) throws -> String {
        let full = "\(root)\(path)"
        let target = Files.exists(full) ? try Files.canonical(full) : full
        let top = root.isEmpty ? "" : try Files.canonical(root)
        guard target.hasPrefix("\(top)/") || target == full else {
            throw MigrationError(
                .failedPrecondition, "\(full) is a link that leads out of \(root), to \(target)",
                hint: "make it a link relative to its folder")
        }
        return target
    }

    private func put(_ path: String, _ bytes: [UInt8]?, mode: UInt32) throws {
        let target = try target(of: path)
        guard let bytes else {
            try Files.remove(target)
            return try Files.synchronizeDirectory(of: target)
        }
        try Files.createDirectories(Files.parent(of: target))
        try Files.writeAtomically(bytes, to: target, mode: mode)
        guard chmod(target, mode) == 0 else { throw systemError("chmod", target) }
    }

    private func mode(of path: String) -> UInt32? {
        (try? File("\(root)\(path)", O_RDONLY).status()).map { $0.st_mode & 0o7777 }
    }

    private func read() throws -> Record {
        guard Files.exists(path) else { return Record() }
        guard let record = try? JSONDecoder().decode(Record.self, from: Data(Files.read(path))), record.version == 1
        else {
            throw MigrationError(
                .dataLoss, "the record of what was prepared, \(path), is damaged or of another version",
                hint: "its entries hold the original files, in base64")
        }
        return record
    }

    private func write(_ record: Record) throws {
        let encoder = JSONEncoder()
        encoder.outputFormatting = [.sortedKeys, .prettyPrinted, .withoutEscapingSlashes]
        try Files.writeAtomically([UInt8](encoder.encode(record)), to: path)
    }

    /// Up to ten minutes: an initramfs for each of several kernels takes its time.
    package static func runProgram(_ command: [String]) throws {
        guard let program = command.first else { return }
        let outcome = try Program.run(program, Array(command.dropFirst()), limit: .seconds(600))
        guard outcome.status == 0 else {
            throw MigrationError(
                .internal,
                "\(command.joined(separator: " ")) failed (\(outcome.status)): \(outcome.output.suffix(2000))",
                hint: "the files are written; run the same command again once that is mended, or --revert")
        }
    }
}
