//! The kernel around the roles, and its shared memory.

use super::super::config::{ROWS, WARPGROUP};
use super::super::contraction::STEP_BYTES;
use super::super::loops::ALL_ROWS;
use super::{Planner, REGISTERS};
use crate::nvidia::arch::Arch;
use dsc_ir::DType;
use dsc_ir::sched::{Block, Buffer, BufferId, Channel, Role, Scheduled};

impl Planner<'_> {
    pub(super) fn scheduled(mut self) -> Option<Scheduled> {
        let mut names = self.values.names.clone();
        let producer = self.role(&self.program.body, true, &mut names)?;
        let mut names = self.values.names.clone();
        let consumer = self.role(&self.program.body, false, &mut names)?;
        let warps = self.config.warpgroups * WARPGROUP / Arch::WARP;
        let redistributed = self.config.warpgroups == 2;
        // Of many tokens the later see more columns; few are of many sequences, which see whatever they have.
        let folded = redistributed && self.program.grid.len() == 2;
        let (produces, consumes) =
            if redistributed { ([0, 4], [4, 4 + warps]) } else { ([warps, warps + 1], [0, warps]) };
        let role = |name: &str, warps, registers, elected, insts| Role {
            name: name.into(),
            warps,
            registers: redistributed.then_some(registers),
            elected,
            body: Block { insts, ..Block::default() },
        };
        let roles = vec![
            role("producer", produces, REGISTERS[0], true, producer),
            role("consumer", consumes, REGISTERS[1], false, consumer),
        ];
        let (buffers, [residents, slots]) = self.buffers();
        let [ahead, depth] = self.config.stages;
        Some(Scheduled {
            name: self.program.name.clone(),
            grid: self.program.grid.clone(),
            // Neighbours share the resident operand.
            persistent: Some(if folded { 1 } else { ALL_ROWS }),
            folded,
            cluster: None,
            team: 1,
            alternate: false,
            dies: 1,
            params: self.values.params,
            threads: produces[1].max(consumes[1]) * Arch::WARP,
            buffers,
            channels: vec![
                Channel { name: "resident".into(), stages: ahead, slots: residents },
                Channel { name: "stream".into(), stages: depth, slots },
            ],
            types: self.values.types,
            places: self.values.places,
            common: Block::default(),
            roles,
        })
    }

    /// Buffers, and those of a stage of each ring.
    fn buffers(&self) -> (Vec<Buffer>, [Vec<BufferId>; 2]) {
        let c = &self.config;
        let columns = STEP_BYTES / self.p.dtype.bytes() as u32;
        let operand = |name: &str, bytes: u32, copies: u32, offset: u32| Buffer {
            name: name.into(),
            dtype: self.p.dtype,
            shape: [bytes / STEP_BYTES, columns],
            pitch: STEP_BYTES,
            swizzle: STEP_BYTES,
            copies,
            offset,
            outside: false,
        };
        let [ahead, depth] = c.stages;
        let mut end = 0;
        let mut buffers = Vec::new();
        for _ in &self.p.residents {
            let bytes = c.resident / self.p.residents.len() as u32;
            buffers.push(operand("resident", bytes, ahead, end));
            end += bytes * ahead;
        }
        let residents = (0..buffers.len() as u32).map(BufferId).collect();
        buffers.push(operand("streamed", c.streamed, depth, end));
        end += c.streamed * depth;
        for _ in 1..self.p.streamed.len() {
            buffers.push(Buffer {
                name: "vector".into(),
                dtype: DType::F32,
                shape: [1, ROWS],
                pitch: ROWS * 4,
                swizzle: 0,
                copies: depth,
                offset: end,
                outside: false,
            });
            end += ROWS * 4 * depth;
        }
        let slots = (self.p.residents.len() as u32..buffers.len() as u32).map(BufferId).collect();
        if c.lists > 0 {
            buffers.push(Buffer {
                name: "lists".into(),
                dtype: DType::I32,
                shape: [1, c.lists / 4],
                pitch: c.lists,
                swizzle: 0,
                copies: 1,
                offset: end,
                outside: false,
            });
            end += c.lists;
        }
        let rows = c.resident / STEP_BYTES;
        for _ in self.p.weights.iter().filter(|_| c.shares_weights) {
            buffers.push(Buffer {
                name: "weights".into(),
                dtype: DType::F32,
                shape: [rows, 1],
                pitch: 4,
                swizzle: 0,
                copies: 1,
                offset: end,
                outside: false,
            });
            end += rows * 4;
        }
        (buffers, [residents, slots])
    }
}
