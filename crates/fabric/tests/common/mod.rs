//! Several processes over the simulated network, in one thread.

#![allow(dead_code, reason = "each test program uses a part")]

use smddp_core::call::PackedCall;
use smddp_core::memory::Region;
use smddp_core::settings::Settings;
use smddp_core::transport::{Ctx, Fabric, FabricFailure, Message, MsgKey};
use smddp_core::{Call, Collective, DType};
use smddp_fabric::FabricEndpoint;
use smddp_fabric::sim::{SimConfig, SimDomain, SimNet};

pub const GROUP: u64 = 77;

pub fn call(count: usize) -> PackedCall {
    Call::new(Collective::AllToAll, DType::U8, count as u64).pack()
}

pub fn settings(pairs: &[(&str, &str)]) -> Settings {
    let mut s = Settings::default();
    for (name, value) in pairs {
        s.set(name, value).unwrap();
    }
    s
}

/// Several processes in one thread.
pub struct World {
    pub net: SimNet,
    pub ends: Vec<FabricEndpoint<SimDomain>>,
    pub done: Vec<Vec<Ctx>>,
    pub failed: Vec<Vec<FabricFailure>>,
}

impl World {
    pub fn new(processes: usize, rails: usize, config: SimConfig, settings: &Settings) -> World {
        let mut world = Self::strangers(processes, rails, config, settings);
        for me in 0..processes {
            world.connect(me);
        }
        world
    }

    /// Nobody knows anybody yet.
    pub fn strangers(processes: usize, rails: usize, config: SimConfig, settings: &Settings) -> World {
        let net = SimNet::new(config);
        let ends = (0..processes)
            .map(|_| FabricEndpoint::over((0..rails).map(|_| net.domain()).collect(), settings).unwrap())
            .collect();
        World { net, ends, done: vec![Vec::new(); processes], failed: vec![Vec::new(); processes] }
    }

    /// Makes every process known to `me`: ids are the numbers of the processes.
    pub fn connect(&mut self, me: usize) {
        for other in 0..self.ends.len() {
            let address = self.ends[other].address();
            let id = self.ends[me].connect(&address, &format!("node{other}")).unwrap();
            assert_eq!(id as usize, other);
        }
    }

    pub fn poll_all(&mut self) {
        for (i, end) in self.ends.iter_mut().enumerate() {
            if let Err(failure) = end.poll(&mut self.done[i]) {
                self.failed[i].push(failure);
            }
        }
    }

    /// Polls everybody until `over`; panics after too many rounds.
    pub fn until(&mut self, mut over: impl FnMut(&World) -> bool) {
        for _ in 0..400_000 {
            if over(self) {
                return;
            }
            self.poll_all();
        }
        let waiting: Vec<_> = self.ends.iter().map(|e| e.waiting_for(GROUP)).collect();
        panic!("stuck: done {:?}, failed {:?}, waiting for {waiting:?}", self.done, self.failed);
    }
}

pub fn message(key: MsgKey, peer: usize, region: Region, ctx: usize) -> Message {
    let call = call(7);
    Message { key, peer: peer as u32, peer_rank: 100 + peer as u32, region, call, ctx: Ctx(ctx as u64) }
}

pub fn region(bytes: &mut [u8]) -> Region {
    // SAFETY: the tests keep their buffers until all operations are over or withdrawn.
    unsafe { Region::of(bytes) }
}

pub fn key(tag: usize) -> MsgKey {
    MsgKey { group: GROUP, seq: 0, tag: tag as u64 }
}

pub fn calm() -> SimConfig {
    SimConfig { seed: 3, ..SimConfig::default() }
}

/// Every way of registering and moving.
pub fn kinds() -> Vec<SimConfig> {
    let mut all = Vec::new();
    for rma in [true, false] {
        for needs_local_mr in [false, true] {
            for early_completion in [false, true] {
                let config = SimConfig { rma, needs_local_mr, early_completion, ..calm() };
                all.push(SimConfig { virt_addr: needs_local_mr, prov_key: needs_local_mr, ..config });
            }
        }
    }
    all
}

pub const SIZES: [usize; 4] = [0, 100, 8192, 1 << 20];
