//! Whether a process still listens at its address: its kernel tells, which the provider keeps to itself.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with, sockopt};

/// A connection that is begun only to see whether it is refused.
pub(super) enum Knock {
    Begun(OwnedFd),
    Refused,
    /// It cannot be tried from here.
    Void,
}

impl Knock {
    /// Begins it; nothing blocks.
    pub fn at(address: SocketAddr) -> Knock {
        match begin(address) {
            Ok(socket) => Knock::Begun(socket),
            Err(Errno::CONNREFUSED) => Knock::Refused,
            Err(_) => Knock::Void,
        }
    }

    /// Whether nobody listens there. One that does, or does not answer, refuses nothing.
    pub fn is_refused(&mut self) -> bool {
        // An error is told once.
        if let Knock::Begun(socket) = self
            && let Ok(Err(Errno::CONNREFUSED)) = sockopt::socket_error(&*socket)
        {
            *self = Knock::Refused;
        }
        matches!(self, Knock::Refused)
    }
}

fn begin(address: SocketAddr) -> rustix::io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(family, SocketType::STREAM, flags, None)?;
    // Closed by a reset: the provider there reads the plain end of a connection as whatever error its thread had before, and where
    // that was "again" it keeps the connection, and looks at it for ever.
    sockopt::set_socket_linger(&socket, Some(Duration::ZERO))?;
    match connect(&socket, &address) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(socket),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::TcpListener;
    use std::time::Instant;

    use super::*;

    #[test]
    fn nobody_is_where_nobody_listens() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let mut knock = Knock::at(address);
        let (mut accepted, _) = listener.accept().unwrap();
        assert!(!knock.is_refused());
        drop(knock);
        let end = accepted.read(&mut [0]).unwrap_err();
        assert_eq!(end.kind(), std::io::ErrorKind::ConnectionReset);
        drop(listener);
        let (mut knock, start) = (Knock::at(address), Instant::now());
        while !knock.is_refused() {
            assert!(start.elapsed() < Duration::from_secs(60));
        }
    }
}
