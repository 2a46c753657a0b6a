//! A job larger than the soft limit of open files. Alone in its process, whose limit it changes.

#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use rustix::process::{Resource, getrlimit, setrlimit};
use smddp_bootstrap::tcp_store::{Identity, Listen, TcpStore};

#[test]
fn a_store_raises_the_soft_limit_for_its_ranks() {
    const SIZE: usize = 100;
    let mut limits = getrlimit(Resource::Nofile);
    limits.current = Some(64);
    setrlimit(Resource::Nofile, limits).unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    let me = |rank| Identity { rank, size: SIZE, secret: [3; 16] };
    let zero = TcpStore::host(me(0), &Listen { loopback: true, ports: vec![0] }, deadline).unwrap();
    let address = [format!("127.0.0.1:{}", zero.port().unwrap())];
    let others: Vec<TcpStore> =
        (1..SIZE).map(|rank| TcpStore::connect(me(rank), &address, deadline).unwrap()).collect();
    zero.ready(deadline).unwrap();
    drop(others);
}
