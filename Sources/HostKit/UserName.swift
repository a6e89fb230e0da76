package import Glibc

/// A user's name or, of one without, the number.
package func userName(_ number: uid_t) -> String {
    var entry = passwd()
    var found: UnsafeMutablePointer<passwd>?
    var buffer = [CChar](repeating: 0, count: 4096)
    guard getpwuid_r(number, &entry, &buffer, buffer.count, &found) == 0, found != nil else { return "\(number)" }
    return String(cString: entry.pw_name)
}
